#!/usr/bin/env bash
# Build on a machine without a GPU, run on one that has a GPU and need not have a network.
#
#   tests/gpu/remote.sh build            here: the kernels and their harnesses, into build/carry/
#   tests/gpu/remote.sh run [PART]...    there, on the same sources with build/carry/: the thin
#                                        module for that Python, then each PART in its own time
#
# A PART is tests, bench, or a harness by its name; all of them if none is named. PYTEST_ARGS,
# BENCH_ARGS and HARNESS_ARGS are passed on. `run` needs g++ and python3 with jax, flax, pytest,
# nanobind, scikit-build-core, cmake and ninja.
set -euo pipefail
cd "$(dirname "$0")/../.."

failed=0
summary=""

# step SECONDS NAME COMMAND...: runs one part and notes how it ended.
step() {
  local limit=$1 name=$2 status=0 start=$SECONDS
  shift 2
  printf '\n== %s\n' "$name"
  timeout --kill-after=10 "$limit" "$@" || status=$?
  if ((status == 124 || status == 137)); then
    summary+="$name: still running after $limit s"$'\n'
  else
    summary+="$name: exit status $status after $((SECONDS - start)) s"$'\n'
  fi
  if ((status != 0)); then failed=1; fi
}

run() {
  local parts=("$@") part
  if ((${#parts[@]} == 0)); then
    parts=(tests)
    for part in build/carry/harness/*; do parts+=("$(basename "$part")"); done
    parts+=(bench)
  fi

  timeout 180 python3 -m pip install -q --no-index --no-deps --no-build-isolation --upgrade \
    --target build/site -C cmake.define.GENIE_KERNELS="$PWD/build/carry/libgenie_kernels.so" .
  export PYTHONPATH="$PWD/build/site${PYTHONPATH:+:$PYTHONPATH}"
  export PYTHONSAFEPATH=1 # import the installed package, not the folder that we stand in
  export GENIE_EXPECT_KERNELS=1

  for part in "${parts[@]}"; do
    case $part in
      tests) step 420 tests python3 -m pytest -m gpu ${PYTEST_ARGS:-} tests ;;
      bench) step 420 bench python3 -m genie_tk_jax bench ${BENCH_ARGS:-} ;;
      *) step 120 "$part" "build/carry/harness/$part" ${HARNESS_ARGS:-} ;;
    esac
  done
  printf '\n%s' "$summary"
  return "$failed"
}

case ${1:-} in
  build) make carry ;;
  run) run "${@:2}" ;;
  *)
    sed -n '2,10s/^# \{0,1\}//p' "$0"
    exit 2
    ;;
esac
