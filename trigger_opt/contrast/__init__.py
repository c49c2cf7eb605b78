"""Do answers to two sets of prompts differ? Black box, no trigger needed: `trigger-opt contrast --a FILE --b FILE …`.

read         prompts and brought answers from files
sets         which prompts are pairs, which are complete
source       which local model or pair: found, checked, loaded (with torch)
ask          its answers, surprise and divergence (with torch)
features     an answer as numbers, from its text alone
phrases      the pool's frequent words and beginnings, chosen without looking at the sets
permutation  difference of means, permutation p-values, step-down max-T, bootstrap intervals
judge        from answers to one record a feature
words, page  the records for a terminal, as an HTML page and as Markdown
run          one scan from its options to its files; options and commands are the command line
"""
