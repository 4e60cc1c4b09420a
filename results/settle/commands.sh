#!/bin/sh
# Every run of chapter 27. Each command adds to results.json what it lacks: on one core, all of it takes some ten hours.
set -e
S="pct settle --out results/settle"
$S --grid '{"train.seed": [4, 5], "learner.algorithm": "backprop"}'
$S --grid '{"train.seed": [1, 2, 3, 4, 5], "learner.relative_precision": 10000}'
$S --grid '{"train.seed": [4, 5], "learner.algorithm": "predictive_coding", "learner.relative_precision": 1000}'
pct compare --iters 2000 --evals 1 --seeds "[4,5]" --keep_models false --variants '["ours, backprop"]' --out results/more_backprop

# five thousand steps
L="$S --train.iters 5000 --train.eval_interval 1250"
$L --grid '{"train.seed": [1, 2, 3, 4, 5], "learner.algorithm": "backprop"}'
$L --grid '{"train.seed": [1, 2, 3, 4, 5], "learner.relative_precision": 10000}'
$L --grid '{"train.seed": 1, "learner.solver": "sweep"}'

# five hundred steps
H="$S --train.iters 500"
$H --grid '{"train.seed": [1, 2, 3, 4, 5], "learner.algorithm": "backprop"}'
$H --grid '{"train.seed": [1, 2, 3], "learner.steps": 1, "learner.relative_precision": [1000, 10000]}'
$H --grid '{"train.seed": [1, 2], "learner.steps": 1, "learner.relative_precision": 100}'
$H --grid '{"train.seed": [1, 2, 3], "learner.steps": 4, "learner.relative_precision": 100}'
$H --grid '{"train.seed": 1, "learner.steps": 4, "learner.relative_precision": 1000}'
$H --grid '{"train.seed": 1, "learner.steps": 1, "learner.relative_precision": 30}'
$H --grid '{"train.seed": [1, 2, 3], "learner.solver": "highway", "learner.steps": 3, "learner.relative_precision": 1000}'

# depth
D="$S --train.iters 250 --train.eval_interval 125"
for N in 12 24; do
  $D --model.n_layer $N --grid '{"train.seed": [1, 2, 3], "learner.algorithm": "backprop"}'
  $D --model.n_layer $N --grid '{"train.seed": 1, "learner.algorithm": "predictive_coding", "learner.relative_precision": 1000}'
  $D --model.n_layer $N --grid '{"train.seed": [1, 2, 3], "learner.relative_precision": 10000}'
done
W='"learner.solver": "highway", "learner.steps": 3, "learner.relative_precision": 1000'
$D --model.n_layer 12 --grid "{\"train.seed\": [1, 2, 3], $W}"
$D --model.n_layer 24 --grid "{\"train.seed\": 1, $W}"
$D --grid '{"train.seed": 1, "learner.algorithm": "backprop"}'
for N in 4 12; do
  $D --model.n_layer $N --grid '{"train.seed": 1, "learner.solver": "state", "learner.steps": 8, "learner.relative_precision": 1000, "learner.curvature_interval": 10}'
done

# a smaller model, on data that is altered
M="$S --model.n_layer 2 --model.d_model 64"
for C in '' ', "label_noise": 0.3' ', "input_noise": 0.2' ', "foreign_start": 0.5'; do
  $M --train.iters 500 --train.eval_interval 500 --grid "{\"train.seed\": [1, 2, 3], \"learner.algorithm\": \"backprop\"$C}"
  $M --train.iters 500 --train.eval_interval 500 --grid "{\"train.seed\": [1, 2, 3], \"learner.steps\": [1, 4], \"learner.relative_precision\": 100$C}"
done
Y="$M --train.iters 500 --train.eval_interval 500"
BP='"learner.algorithm": "backprop"'; PC='"learner.steps": 4, "learner.relative_precision"'
for C in '"label_noise": 0.3' '"input_noise": 0.2'; do
  $Y --grid "{\"train.seed\": [4, 5, 6], $BP, $C}"
  $Y --grid "{\"train.seed\": [4, 5, 6], $PC: 100, $C}"
done
$Y --grid "{\"train.seed\": [1, 2, 3], $BP, \"train.learning_rate\": 0.002}"
$Y --grid "{\"train.seed\": [1, 2, 3], $PC: 100, \"train.learning_rate\": 0.002}"
$Y --grid "{\"train.seed\": [1, 2, 3], $BP, \"label_noise\": 0.3, \"train.learning_rate\": [0.0005, 0.002, 0.004, 0.008]}"
$Y --grid "{\"train.seed\": [1, 2, 3], $PC: 100, \"label_noise\": 0.3, \"train.learning_rate\": [0.0005, 0.002, 0.004]}"
$Y --grid "{\"train.seed\": [1, 2, 3], $PC: 30, \"label_noise\": 0.3}"
for R in '' ', "train.learning_rate": [0.004, 0.008]'; do
  $Y --grid "{\"train.seed\": [1, 2, 3], $BP, \"label_noise\": 0.6$R}"
done
for R in '' ', "train.learning_rate": 0.004'; do
  $Y --grid "{\"train.seed\": [1, 2, 3], $PC: [100, 30], \"label_noise\": 0.6$R}"
done
$Y --grid "{\"train.seed\": [1, 2, 3], $BP, \"input_noise\": 0.2, \"train.learning_rate\": [0.002, 0.004, 0.008]}"
$Y --grid "{\"train.seed\": [1, 2, 3], $PC: 100, \"input_noise\": 0.2, \"train.learning_rate\": [0.002, 0.004]}"
for C in '"label_noise": 0.3' '"input_noise": 0.2'; do
  $H --grid "{\"train.seed\": [1, 2, 3], $BP, $C}"
  $H --grid "{\"train.seed\": [1, 2, 3], $PC: 100, $C}"
done
for C in '"train.batch_size": 2' '"train.batch_size": 1, "in_order": 1'; do
  $M --train.iters 1000 --train.eval_interval 1000 --grid "{\"train.seed\": [1, 2, 3], \"learner.algorithm\": \"backprop\", $C}"
  $M --train.iters 1000 --train.eval_interval 1000 --grid "{\"train.seed\": [1, 2, 3], \"learner.steps\": [1, 4], \"learner.relative_precision\": 100, $C}"
done

# softer, nearer to equilibrium, centred, from soft to stiff
M="$M --train.iters 500 --train.eval_interval 500"
$M --grid '{"train.seed": [1, 2, 3], "learner.steps": [4, 8], "learner.relative_precision": 30}'
$M --grid '{"train.seed": [4, 5, 6], "learner.algorithm": "backprop"}'
$M --grid '{"train.seed": [1, 2, 3, 4, 5, 6], "learner.steps": 4, "learner.relative_precision": 100, "learner.centred": true}'
$M --grid '{"train.seed": [1, 2, 3], "learner.steps": 4, "learner.relative_precision": 30, "learner.relative_precision_end": 10000}'
$M --grid '{"train.seed": [1, 2, 3], "learner.steps": 4, "learner.relative_precision": 10000}'
