"""Before reinforcement learning: what the policy is shown by example.

In: tasks and whoever can play them well. Out: a policy that knows the protocol.
Exemplars are played through the same episode code as everything else and
learned with the learner's supervised step; `distill/` gets them from a model
behind an HTTP endpoint, and chooses among them. The tiny model, its base and the
needle world's oracle live here too; nothing here knows the fleet.
"""
