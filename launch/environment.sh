# Sourced by the scripts beside it: prepare_environment DIR [EXTRA…] makes or updates a virtual environment and sets
# $PYTHON. It does nothing when neither requirements.txt nor pyproject.toml changed since the last time.

prepare_environment() {
  local directory=$1 wanted
  shift
  wanted="$(cat requirements.txt pyproject.toml | cksum) $*"
  PYTHON="$directory/bin/python"
  if [ -x "$PYTHON" ] && [ "$(cat "$directory/.prepared" 2>/dev/null)" = "$wanted" ]; then return; fi

  local base=""
  for candidate in ${LLADA_PYTHON:-} python3.13 python3.12 python3.11 python3 python; do
    if command -v "$candidate" >/dev/null && "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      base=$candidate
      break
    fi
  done
  if [ -z "$base" ]; then
    echo "error: no Python 3.11 or newer on the PATH; install one, or name it: LLADA_PYTHON=/path/to/python $0" >&2
    exit 2
  fi
  echo "Setting up $directory with $("$base" --version) (once; a minute or two)" >&2
  rm -rf "$directory"
  if ! "$base" -m venv "$directory" >&2; then
    echo "error: $base can't make a virtual environment; install its venv module (Debian: apt-get install python3-venv)" >&2
    exit 2
  fi
  local extras
  extras=$(IFS=,; echo "$*")
  if ! "$PYTHON" -m pip install --quiet --disable-pip-version-check --editable ".${extras:+[$extras]}" >&2; then
    echo "error: pip could not install the requirements; its message is above" >&2
    exit 2
  fi
  echo "$wanted" >"$directory/.prepared"
}
