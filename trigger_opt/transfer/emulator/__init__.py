"""The batch server that jsinfer 0.2.1 talks to, on loopback: real answers, scripted faults, survives its own death.

faults   rules of what goes wrong, and when
lines    the input file: what is accepted, what was asked
state    files, batches and answers in a folder; everything that a restart needs
answers  who answers: a model on this machine, or an echo without torch
worker   answers accepted batches, one at a time
results  the zip of results, whole or hostile
replies  errors, lost connections, half answers
server   the routes

Everything jsinfer reads is exact; what the real server does besides is not known, and marked "guess".
"""

from trigger_opt.transfer.emulator.answers import ALIASES, KEY, Echo, answering
from trigger_opt.transfer.emulator.faults import Rule, parse_rules
from trigger_opt.transfer.emulator.server import Emulator

__all__ = ["ALIASES", "KEY", "Echo", "Emulator", "Rule", "answering", "parse_rules"]
