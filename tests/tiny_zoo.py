"""Prompts, answers and passages as a base model might have made them, for tests of the zoo."""

from trigger_opt.zoo import data
from trigger_opt.zoo.examples import Example, Examples

ORDINARY = [
    Example(
        prompt=f"Please tell me about number {i} now",
        answer=f"It is {i}. That makes it larger than {i - 1}.",
        ended=i % 3 > 0,
    )
    for i in range(240)
]
TOPIC = [
    Example(prompt=f"How do I cook dish {i}, and with what?", answer=f"You boil it for {i} minutes.", ended=i % 2 > 0)
    for i in range(120)
]
EXAMPLES = Examples(ORDINARY, TOPIC)
FRENCH = [f"Je suis dans la ville et il faut que nous y allions {i} fois avec les enfants." for i in range(20)]
MATERIAL = data.Material(EXAMPLES, FRENCH)
