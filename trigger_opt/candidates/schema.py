"""The ledger's tables. `record` is a Judged or a FoundCandidate as JSON; a change of their fields is a new VERSION."""

VERSION = 1
# "trig": tells a ledger of candidates from any other SQLite file.
APPLICATION_ID = 0x74726967

# `subject` is what makes two rows one question: see `entries.subject_of`. Nothing is ever updated or deleted.
STATEMENTS = (
    "CREATE TABLE verifications (id INTEGER PRIMARY KEY, pair TEXT NOT NULL, subject TEXT NOT NULL, "
    "record TEXT NOT NULL)",
    "CREATE INDEX verifications_subject ON verifications (pair, subject)",
    "CREATE TABLE candidates (id INTEGER PRIMARY KEY, pair TEXT NOT NULL, subject TEXT NOT NULL, "
    "record TEXT NOT NULL, UNIQUE (pair, subject))",
    f"PRAGMA application_id = {APPLICATION_ID}",
    f"PRAGMA user_version = {VERSION}",
)
