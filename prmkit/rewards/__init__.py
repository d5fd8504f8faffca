"""A served judge as the reward of RL frameworks and evaluations: one module each, none of which needs torch.

Every framework does something else with a step that has no score, and most of them silently make it 0. So each module
here answers as its framework survives it, and says in its docstring how.
"""
