#!/usr/bin/env bash
# Formatting, lint, types and tests: bash launch/test.sh [arguments of pytest]; --slow: all of them
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/environment.sh
prepare_environment "$PWD/.venv-llada-test" test
export JAX_PLATFORMS=cpu
"$PYTHON" -m ruff format --check .
"$PYTHON" -m ruff check .
"$PYTHON" -m pyright --pythonpath "$PYTHON"
"$PYTHON" -m pytest -n 2 "$@"
