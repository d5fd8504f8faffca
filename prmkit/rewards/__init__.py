"""A served judge as the reward of RL frameworks and evaluations: one module each, none of which needs torch.

Frameworks differ in what they do with a step that has no score; most silently make it 0. So each module here answers in
a way that its framework handles safely, and its docstring says how.
"""
