#!/bin/sh
# Every run of chapter 27 on wrong targets. Each command adds to results.json what it lacks.
set -e
S="pct settle --out results/wrong_targets --train.iters 500 --train.eval_interval 500"
BP='"learner.algorithm": "backprop"'; PC='"learner.relative_precision": 100'
N='"label_noise": 0.3'; R='"train.learning_rate": [0.001, 0.002, 0.004]'

# two blocks of width 64: learning rate and strength from seeds 1 to 3, and more seeds at the rate that all of them chose
M="$S --model.n_layer 2 --model.d_model 64"
for T in "\"train.seed\": [1, 2, 3], $R" '"train.seed": [4, 5, 6], "train.learning_rate": 0.002'; do
  $M --grid "{$T, $N, $BP}"
  $M --grid "{$T, $N, $PC, \"learner.steps\": [1, 4]}"
  $M --grid "{$T, $N, $BP, \"label_smoothing\": [0.1, 0.3]}"
  $M --grid "{$T, $N, $BP, \"generalised\": [0.3, 0.7]}"
  $M --grid "{$T, $N, $BP, \"corrected\": 0.3}"
done

# the demo's model
T='"train.seed": [1, 2, 3], "train.learning_rate": [0.001, 0.002]'
$S --grid "{$T, $N, $BP}"
$S --grid "{$T, $N, $PC, \"learner.steps\": 4}"
$S --grid "{$T, $N, $BP, \"corrected\": 0.3}"
$S --grid "{$T, $N, $BP, \"label_smoothing\": 0.1}"
$S --grid "{$T, $N, $BP, \"generalised\": 0.3}"
$S --grid "{$T, $N, $PC, \"learner.steps\": 1}"
