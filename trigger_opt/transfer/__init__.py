"""The best candidates to models without weights, through servers that fail: nothing lost, nothing spent twice.

requests   one question, one answer
plan       which questions: strings, controls, contexts, repeats; what they will cost
ledger     SQLite: what was meant, submitted, answered; survives the process
client     what a server must offer, and how a call can fail; clients/ speaks to real ones
runner     submit, wait, download, store; begins again where the ledger says
outcome    rates, clusters of answers, a verdict for each model; shift of activations
emulator/  the batch server on loopback, with answers from a small model and scripted faults

No torch here, but in `local`, which answers with a model on this machine.
"""
