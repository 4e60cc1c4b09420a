#!/bin/sh
# Every run of chapter 27 on wrong targets. Each command adds to results.json what it lacks.
set -e
S="pct settle --out results/wrong_targets --train.iters 500 --train.eval_interval 500"
BP='"learner.algorithm": "backprop"'; PC='"learner.relative_precision": 100'
N='"label_noise": 0.3'; R='"train.learning_rate": [0.001, 0.002, 0.004]'

# two blocks of width 64: each learner with its own learning rate
M="$S --model.n_layer 2 --model.d_model 64"
$M --grid "{\"train.seed\": [1, 2, 3, 4, 5, 6], $BP, $N, $R}"
$M --grid "{\"train.seed\": [1, 2, 3, 4, 5, 6], $PC, \"learner.steps\": [1, 4], $N, $R}"
$M --grid "{\"train.seed\": [1, 2, 3, 4, 5, 6], $BP, $N, $R, \"label_smoothing\": [0.1, 0.3]}"
$M --grid "{\"train.seed\": [1, 2, 3, 4, 5, 6], $BP, $N, $R, \"generalised\": [0.3, 0.7]}"
$M --grid "{\"train.seed\": [1, 2, 3, 4, 5, 6], $BP, $N, $R, \"corrected\": 0.3}"

# the demo's model
R='"train.learning_rate": [0.001, 0.002]'
$S --grid "{\"train.seed\": [1, 2, 3], $BP, $N, $R}"
$S --grid "{\"train.seed\": [1, 2, 3], $PC, \"learner.steps\": [1, 4], $N, $R}"
$S --grid "{\"train.seed\": [1, 2, 3], $BP, $N, $R, \"label_smoothing\": 0.1}"
$S --grid "{\"train.seed\": [1, 2, 3], $BP, $N, $R, \"generalised\": 0.3}"
$S --grid "{\"train.seed\": [1, 2, 3], $BP, $N, $R, \"corrected\": 0.3}"
