"""Many jobs, one answer: `trigger-opt collect SWEEP_DIR`. Models, and torch, are loaded for verification alone.

commands        arguments, exit codes
overrides       what the sweep was to run, from its multirun.yaml; the only module that knows Hydra
jobs            what became of each job
judged          what each job said of its own strings
merge           the candidates of all jobs, each string once
suspects        jobs of the same pair and contexts, merged
folder          the merged records, as a run folder
words           the table of jobs, and the commands that run what is missing
verification    the best strings judged once, and the report
"""
