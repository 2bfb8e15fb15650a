"""The families of published checkpoints; a new one is a file here and a line in FAMILIES."""

from llada_jax.fields import InputError
from llada_jax.interop.families import illada, llada
from llada_jax.interop.families.family import Family

FAMILIES: dict[str, Family] = {  # by the `model_type` of config.json, which is also config.model.family
    "llada": llada.FAMILY,
    "illada": illada.FAMILY,
}


def require(name: str) -> Family:
    """The family of that name. Raises InputError if there is none."""
    if name not in FAMILIES:
        raise InputError(f"config.model.family {name!r} is not one of {', '.join(FAMILIES)}")
    return FAMILIES[name]
