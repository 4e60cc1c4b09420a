cd . && git reset -q --hard main && git clean -fdq nbs pc_transformer && source tools/move/env.sh; cp tools/move/keep/build_docs.py tools/; cp tools/move/keep/test_docs.py tests/; cp tools/move/keep/Makefile tools/move/keep/pyproject.toml .
rm -f tools/move/done.json
PLAIN=1 python3 tools/move/move.py . 00_notation 10_config 19_isolation 11_energies 12_attention 13_kernels 14_layers 15_model 16_gpu_kernels 17_cache 18_attention_node 20_settling 21_learning 22_monitoring 23_generation 24_uncertainty 25_solvers 26_node_precision 27_settling_study 28_processes 29_evidence 30_data 31_training 32_interop 34_cli 38_settled_reading 39_generation_speed 41_components 42_tinyshakespeare 49_performance
find pc_transformer -name '*.py' -not -name '__init__.py' -delete
F="python3 tools/move/face.py ."
$F energies "What an error costs: one small class per family of densities." elliptical sampling fitting families mixture categorical
$F attention "Who explains a query: likelihoods of keys, and heads that learn their precision." scores checks sharpness attend head
$F attention.kernels "Every family without a matrix of scores." masks steps sdpa merge chunked choose
$F model "Predictors in a row." layers transformer convert
$F settling "One free energy, and the ways down." chain free_energy settled errors sweeps states
$F learning "Weights move by local gradients." learners incremental make
$F monitoring "Is it settling, is it learning, what to turn." measures snapshot diagnosis plots monitor
$F inference "From logits to text, and how sure." sampling packed cache reader decode generate uncertainty calibration evidence
$F data "Corpora, tokenizers, batches and baselines." corpora tokenizers batches ngrams damage text
$F training "One run: files, checkpoints, the loop." files trainer checkpoints loop parallel
$F interop "Other people's models, in and out." gpt2 transformers
mkdir -p pc_transformer/theory; printf "\"\"\"Derivations that a machine checks; nothing in the library imports them.\"\"\"\n" > pc_transformer/theory/__init__.py
nbdev_export
