# Sourced by the scripts beside it: prepare_environment DIRECTORY [EXTRA…] makes or updates a virtual environment there
# with environment.py, and sets $PYTHON to its Python.

# Working memory in huge pages. Otherwise the kernel hands it out again for every step, in pages of 4 KiB, which takes a
# tenth of a step on a CPU; on TPU hosts JAX asks for them. glibc reads this as a program starts; other C libraries don't.
export GLIBC_TUNABLES="${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}"

find_python() { # sets $base_python to one that can make environments
  local candidate
  for candidate in ${LLADA_PYTHON:-} python3.13 python3.12 python3.11 python3 python; do
    if command -v "$candidate" >/dev/null &&
      "$candidate" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      base_python=$candidate
      return
    fi
  done
  return 1
}

prepare_environment() {
  if ! find_python; then
    echo "error: no Python 3.11 or newer with its venv module on the PATH (Debian: apt-get install python3-venv);" \
      "install one, or name it: LLADA_PYTHON=/path/to/python $0" >&2
    exit 2
  fi
  "$base_python" launch/environment.py "$@" || exit $?
  PYTHON="$1/bin/python"
}
