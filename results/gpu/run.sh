# The steps to run on a GPU, unattended. Called again, it continues trainings and keeps finished measurements.
#   bash results/gpu/run.sh tests|bench|crowd|teacher|table1      from the checkout
# OUT and CIFAR10 are folders; LIMIT: seconds after which a training saves its state and stops.
# `table1` needs `teacher`: WRN-16-2 -> WRN-16-1, the paper's schedule, five methods with SEEDS seeds each, all side by side.
# COMPILE=graphs replays its steps as CUDA graphs. Each method is compiled once, by a run of a few steps, before all start.
# MPS=1 starts CUDA's multi-process service for `table1` and `crowd`, so that the processes' kernels run side by side.
set -u
OUT="${OUT:-runs/gpu}"; CIFAR10="${CIFAR10:-data/cifar10}"; SEEDS="${SEEDS:-5}"; LIMIT="${LIMIT:-570}"
AT="${AT:-attention-transfer}"; PYTHON="${PYTHON:-python}"
mkdir -p "$OUT"
limited() { timeout --signal TERM --kill-after 60 "$LIMIT" "$@"; }
paper="--recipe cifar10-paper --data cifar10:$CIFAR10"
share() {
  if [ "${MPS:-0}" = 1 ]; then nvidia-cuda-mps-control -d; trap 'echo quit | nvidia-cuda-mps-control' EXIT; fi
  export OMP_NUM_THREADS=1
}
case ${1:-} in
tests) $PYTHON -m pytest -q -rs 2>&1 | tee "$OUT/tests.txt" ;;
bench)
  rm -f "$OUT/bench.md"
  measure() {  # NAME COMMAND: once, and a table on the page
    [ -f "$OUT/$1-gpu.json" ] || $2 --json "$OUT/$1-gpu.json" 2>&1 | tee "$OUT/bench-$1.txt"
    printf '## %s\n\n`%s --json %s`\n\n| |\n\n' "$1" "${2/"$PYTHON"/python}" "$OUT/$1-gpu.json" >> "$OUT/bench.md"
    $PYTHON bench/tables.py "$OUT/bench.md"
  }
  for name in step epoch loss teacher gradient compile; do measure $name "$AT bench $name"; done
  measure ablation "$PYTHON bench/ablation.py" ;;
crowd)
  share
  $PYTHON bench/sweep.py --compile on --steps 100 --json "$OUT/sweep-gpu-mps${MPS:-0}.json" 2>&1 | tee "$OUT/sweep-mps${MPS:-0}.txt" ;;
teacher) limited $AT train $paper --model wrn-16-2 --out "$OUT/teacher" ;;
table1)
  methods="none at full kd at+kd"
  distill() {  # METHOD OPTIONS; the student alone takes no teacher
    local teacher=(--teacher "$OUT/teacher")
    [ "$1" = none ] && teacher=()
    limited $AT distill $paper --compile "${COMPILE:-on}" "${teacher[@]}" --student wrn-16-1 --method "$@"
  }
  for method in $methods; do
    { TORCHINDUCTOR_COMPILE_THREADS=3 distill $method --max-steps 5 --out "$OUT/first/$method" > "$OUT/$method.log" 2>&1 \
        || touch "$OUT/failed"; } &
  done
  wait
  [ -f "$OUT/failed" ] && { rm "$OUT/failed"; tail -n 3 "$OUT"/*.log; exit 1; }
  share
  export TORCHINDUCTOR_COMPILE_THREADS=1
  for method in $methods; do
    distill $method --seeds "$SEEDS" --jobs "$SEEDS" --out "$OUT/$method" >> "$OUT/$method.log" 2>&1 &
  done
  wait
  tail -n 1 "$OUT"/*.log
  $AT compare "$OUT/teacher" "$OUT"/{none,at,full,kd,at+kd}/seed-* --out "$OUT/table1.html" | tee "$OUT/table1.txt" ;;
*) echo "unknown step '${1:-}': expected tests, bench, crowd, teacher or table1" >&2; exit 2 ;;
esac
