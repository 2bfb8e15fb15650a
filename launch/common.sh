# Sourced by the scripts beside it.

fail() { echo "error: $*" >&2; exit 2; } # a mistake of the user

show() { # prints a command (unless --quiet) and runs it (unless --dry_run)
  if [ -z "${quiet:-}" ]; then { printf '+'; printf ' %q' "$@"; echo; } >&2; fi
  if [ -z "${dry_run:-}" ]; then "$@"; fi
}

quoted() { if [ $# -gt 0 ]; then printf ' %q' "$@"; fi; } # each word for another shell, a space before it

usage() { # the comment at the head of the calling script
  sed -n '2,/^[^#]/s/^# \{0,1\}//p' "launch/$(basename "$0")"
  exit 0
}

gcloud_default() { gcloud config get-value "$1" 2>/dev/null || true; }

# Where a run keeps JAX's compiled programs, so that its next start compiles nothing: beside its workdir, because that
# place outlives the machine and every host reads it, where JAX lets the first host alone write. Prints the directory,
# or nothing for --cache=none.
cache_for() { # CHOICE FLAGS-OF-THE-TRAINER…
  local choice=$1 workdir="" flag before=""
  shift
  for flag in "$@"; do
    case $flag in --workdir=*) workdir=${flag#*=} ;; esac
    if [ "$before" = --workdir ]; then workdir=$flag; fi
    before=$flag
  done
  while [[ $workdir == *[!/]/ ]]; do workdir=${workdir%/}; done
  if [ -n "$choice" ]; then
    if [ "$choice" != none ]; then echo "$choice"; fi
    return
  fi
  case $workdir in
    "") ;;
    *://*/*) echo "${workdir%/*}/compilation_cache" ;;
    *://*) echo "$workdir/compilation_cache" ;;
    */*) echo "${workdir%/*}/compilation_cache" ;;
    *) echo compilation_cache ;;
  esac
}
