#!/bin/sh
# Every run of chapter 27 that settles until its residual is below one per cent, or 400 steps. Each command adds what is missing.
set -e
S="pct settle --out results/equilibrium --model.n_layer 2 --model.d_model 64 --train.eval_interval 50"
BP='"learner.algorithm": "backprop"'; PC='"learner.steps": 400, "learner.tolerance": 0.01, "learner.relative_precision"'
$S --train.iters 500 --grid "{\"train.seed\": [1, 2, 3], $PC: [100, 1000], \"label_noise\": 0}"
$S --train.iters 500 --grid "{\"train.seed\": [1, 2, 3], $BP, \"label_noise\": 0}"
$S --train.iters 500 --grid "{\"train.seed\": [1, 2, 3], $PC: 100, \"label_noise\": 0.3}"
$S --train.iters 500 --grid "{\"train.seed\": [1, 2, 3], $BP, \"label_noise\": 0.3}"
$S --train.iters 250 --grid "{\"train.seed\": [1, 2, 3], $PC: 30, \"label_noise\": 0}"
$S --train.iters 250 --grid "{\"train.seed\": [1, 2, 3], $BP, \"label_noise\": 0}"
