#!/usr/bin/env bash
# Everything that is measured on one GPU, its lines appended to a file, then the tables.
#     bash benchmarks/gpu.sh [FILE]
# What matters most comes first. A command that fails (too little memory, a package that is missing) says why, and the
# rest goes on.
set -uo pipefail
cd "$(dirname "$0")/.."
lines=${1:-lines.jsonl}

run() {
    echo "+ $*" >&2
    "$@" | tee -a "$lines" || echo "failed: $*" >&2
}

# Training.
run python benchmarks/peers.py train --config configs/mixtral_h200.yaml --alone --steps 5 \
    --only mixtral_jax "transformers bfloat16" "dense products"
# With weights and optimizer state in bfloat16, as transformers' are.
run python benchmarks/peers.py train --config configs/mixtral_h200.yaml model.param_dtype=bfloat16 \
    --alone --steps 5 --only mixtral_jax "dense products"
run python benchmarks/train.py --config configs/mixtral_h200.yaml --steps 10 --operations 20
run python benchmarks/train.py --config configs/mixtral_h200.yaml --steps 10 training.batch_size=12 model.remat=matmuls

# Decoding.
for batch in 1 64; do
    run python benchmarks/peers.py decode --config configs/mixtral_8x7b_h200.yaml --alone --steps 3 \
        --batch $batch --only mixtral_jax "transformers bfloat16" "reading active weights"
done
run python benchmarks/decode.py --config configs/mixtral_8x7b_h200.yaml --batch 8

# The experts' product: the shapes of mixtral_h200.yaml, and of 8x7B's gate and down products.
for shape in "--rows 65536 --width 2048 --hidden 7168" "--rows 16384 --width 4096 --hidden 14336" \
    "--rows 16384 --width 14336 --hidden 4096"; do
    run python benchmarks/grouped_matmul.py $shape
done

python benchmarks/table.py < "$lines"
