#!/usr/bin/env bash
# Train the pocket bundle from nothing, into runs/pocket, and pack it into bundles/pocket. docs/training.md has the times.
set -euo pipefail
cd "$(dirname "$0")/../.."
runs=runs/pocket

pocket() { python -m giantleap.training.pocket "$@"; }
prepare() { # PICTURES PAIRS [OPTION...]
    giantleap train prepare "$runs/$1" --out "$runs/$2" --bundle "$runs/pocket24" --min-side-px 256 --tile-px 256 \
        --store float16 --precision bfloat16 "${@:3}"
}

pocket autoencoder --length 46m
pocket bundle

pocket pictures
prepare pictures pairs
giantleap train run --config training/pocket/adapter.toml --out $runs/lua
pocket pictures --out $runs/more_pictures --count 9600 --still-lifes 500 --orientations 8
prepare more_pictures more_pairs
giantleap train run --config training/pocket/adapter_long.toml --out $runs/lua_long
prepare more_pictures mixed_pairs --filter mixed
giantleap train run --config training/pocket/adapter_mixed.toml --out $runs/lua_mixed
giantleap train average $runs/lua_long/lua.safetensors $runs/lua_mixed/lua.safetensors --out $runs/lua.safetensors

pocket scenes --count 3159
pocket text --length 628 --compiled
pocket text --start $runs/text/state.pt --out $runs/text_long --length 2561 --compiled
# Stopped before the end of its schedule.
timeout 60m python -m giantleap.training.pocket text --start $runs/text_long/state.pt --out $runs/text_fine \
    --patch 2 --batch 24 --length 85m --compiled || test $? = 124
pocket text --start $runs/text_fine/state.pt --out $runs/text_short --patch 2 --batch 24 --length 46m --compiled

pocket pictures --out $runs/swinir_pictures --count 1600 --orientations 1
pocket swinir --scale 2 --pictures-dir $runs/swinir_pictures --out $runs/swinir2 --length 5000
pocket swinir --scale 4 --pictures-dir $runs/swinir_pictures --out $runs/swinir4 --length 3000 \
    --start $runs/swinir2/swinir_x2.safetensors
pocket pictures --out $runs/single_pictures --count 9600 --still-lifes 500 --orientations 1
pocket swinir --scale 2 --pictures-dir $runs/single_pictures --out $runs/swinir2_long --length 6000 \
    --start $runs/swinir4/swinir_x4.safetensors
pocket swinir --scale 4 --pictures-dir $runs/single_pictures --out $runs/swinir4_long --length 4500 \
    --start $runs/swinir2_long/swinir_x2.safetensors

pocket pack --text-dir $runs/text_short/pipeline --lua-file $runs/lua.safetensors \
    --swinir $runs/swinir2_long/swinir_x2.safetensors --swinir $runs/swinir4_long/swinir_x4.safetensors
