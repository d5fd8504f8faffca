"""Use a served judge as a reward in RL frameworks and evaluations: one module per framework, without torch.

Frameworks treat a step without a score differently, and most silently make it 0. So each module here returns something
that its framework handles safely, which its docstring describes.
"""
