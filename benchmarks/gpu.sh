#!/usr/bin/env bash
# All that a CUDA GPU has to settle, in ten minutes or little more: bash benchmarks/gpu.sh [DIRECTORY]
# The tests that need one, the throughput tables of the defaults and of the classic recipe (with Stable-Baselines3 if it
# is installed), a million steps of Breakout, and the speed with its network of 32 and 64 games and of as many emulator
# threads as cores and one less. Everything is printed and kept in DIRECTORY, by default results/gpu, which must hold no
# run yet. It takes 22 GB of disk for a while. The exit status is that of the first that failed.
set -uo pipefail
mkdir -p "${1:-$(dirname "$0")/../results/gpu}"
out=$(cd "${1:-$(dirname "$0")/../results/gpu}" && pwd)
cd "$(dirname "$0")/.."
root=$PWD status=0
mkdir "$out/breakout" || exit  # a finished run would not run again

python -m pytest -o addopts= -m gpu -v --tb=short -n 4 tests/test_gpu.py 2>&1 | tee "$out/tests.txt" || status=$?

peers=$(python -c 'import stable_baselines3' 2>/dev/null && echo --peers)
for recipe in shipped classic-uniform; do
    python benchmarks/throughput.py --recipe $recipe $([ $recipe = shipped ] || echo $peers) --rounds 1 \
        --json "$out/throughput-$recipe.json" 2>&1 | tee "$out/throughput-$recipe.txt" || status=${status/#0/$?}
done

cd "$out/breakout" || exit
start=$SECONDS
python "$root/main.py" --SAVE_PREFIX=./models --MAX_STEPS=1_000_000 --EVALUATE_FREQ=500_000 2>&1 | tee log.txt || status=${status/#0/$?}
echo "a million steps of Breakout took $((SECONDS - start)) s, evaluations included" | tee seconds.txt
cat rewards.txt
rm -f models/checkpoint_*  # the loops below want its room for theirs

cores=$(PYTHONPATH=$root python -c 'import utils_machine; print(utils_machine.count_cores())')
for games in 32 64; do
    for threads in $((cores - 1)) "$cores"; do
        name=trained-$games-games-$threads-threads
        python "$root/benchmarks/throughput.py" --recipe shipped --only loop_prioritized --rounds 1 --NUM_ENVS=$games \
            --LEARNING_RATE=1e-7 --emulator-threads "$threads" --model models/model_002 --json "$out/$name.json" \
            2>&1 | tee "$out/$name.txt" || status=${status/#0/$?}
    done
done
if grep -q 'CUDA graphs do not work here' "$out"/*.txt log.txt; then
    echo "error: it went without CUDA graphs" >&2
    status=${status/#0/1}
fi
exit "$status"
