"""The ledger's tables. Times are seconds since 1970; JSON columns hold what `Request` and `Question` hold."""

VERSION = 1

# What a batch goes through. Only from "submitting" on can it have cost anything.
#   uploading   meant; nothing sent but its input file
#   submitting  written down before it is sent: a process that dies here leaves the question whether it arrived
#   submitted   the server's id is known
#   lost        its answer never came, or the process died in "submitting"; only the user may free its lines
#   stored      results read to their end
#   ended       the server gave it up: failed, cancelled, expired
#   dropped     never submitted; its lines are free
#   released    lost or ended, and the user said to ask again; its lines are free
SCHEMA = """
CREATE TABLE meta (version INTEGER NOT NULL);
CREATE TABLE plans (
  id INTEGER PRIMARY KEY, created REAL NOT NULL, server TEXT NOT NULL, run_dir TEXT NOT NULL, settings TEXT NOT NULL
);
CREATE TABLE requests (
  key TEXT PRIMARY KEY, server TEXT NOT NULL, model TEXT NOT NULL, endpoint TEXT NOT NULL, messages TEXT NOT NULL,
  options TEXT NOT NULL, module_names TEXT NOT NULL, repeat INTEGER NOT NULL, estimate INTEGER NOT NULL
);
CREATE TABLE planned (
  plan INTEGER NOT NULL REFERENCES plans, position INTEGER NOT NULL, key TEXT NOT NULL REFERENCES requests,
  custom_id TEXT NOT NULL, kind TEXT NOT NULL, string TEXT NOT NULL, inserted TEXT NOT NULL,
  context INTEGER NOT NULL, prompt TEXT NOT NULL, PRIMARY KEY (plan, position)
);
CREATE INDEX planned_key ON planned (key);
CREATE TABLE batches (
  id INTEGER PRIMARY KEY, label TEXT NOT NULL UNIQUE, server TEXT NOT NULL, model TEXT NOT NULL,
  endpoint TEXT NOT NULL, state TEXT NOT NULL, file_id TEXT, remote_id TEXT, detail TEXT NOT NULL DEFAULT '',
  created REAL NOT NULL, submitted REAL, ended REAL
);
CREATE INDEX batches_state ON batches (state);
CREATE TABLE lines (
  batch INTEGER NOT NULL REFERENCES batches, key TEXT NOT NULL REFERENCES requests, custom_id TEXT NOT NULL,
  state TEXT NOT NULL, detail TEXT NOT NULL DEFAULT '', PRIMARY KEY (batch, custom_id)
);
CREATE INDEX lines_key ON lines (key);
CREATE TABLE answers (
  key TEXT PRIMARY KEY REFERENCES requests, batch INTEGER NOT NULL REFERENCES batches, text TEXT NOT NULL,
  activations TEXT, input_tokens INTEGER NOT NULL, output_tokens INTEGER NOT NULL, counted_by_server INTEGER NOT NULL,
  answered REAL NOT NULL
);
"""

# States of a batch whose lines must not be asked again, and whose tokens are set aside: two batches prepared at one
# time must not both take the last of the budget.
HELD = ("uploading", "submitting", "submitted", "lost")
