"""The application around `pretrain_gpt.py`: data, settings, the run folder, progress, the report. It is not installed.

settings.py  the JSON and the flags of the example script
optimizer.py the fastest AdamW that is installed; weight-decay groups
recorder.py  one run's record: metrics, checkpoints, the report
saved.py     which run a checkpoint is of
export.py    the average as one file of safetensors
text.py      which files make up a corpus, cut into documents
records.py   files with a text in each record: JSON lines, parquet, saved data sets
tokens.py    documents into token numbers: bytes, or a tokenizer file
indexed.py   whether a Megatron indexed dataset and its description are whole
corpus.py    tokens into a Megatron indexed dataset, prepared once
data.py      that dataset through megatron-core's GPT dataset; batches that a resume continues exactly
folder.py    the folder of one run: metrics.csv, summary.json, checkpoints/
progress.py  a bar on a terminal, lines in a log
monitors.py  settings and figure to TensorBoard, W&B, Comet
report.py    the figure of a run
"""
