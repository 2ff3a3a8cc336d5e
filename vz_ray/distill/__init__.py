"""Trajectories from an expert: exemplars that it plays, corrections of what the policy got wrong.

In: tasks or the policy's own wrong episodes, and a model behind an
OpenAI-compatible endpoint. Out: curated trajectories, a data set in the SFT
layout, and a card that says where each came from and what it cost. Knows
nothing of engines or learners: episodes are played by the ordinary runner.

    account    replies and their cost, on disk: nothing is paid for twice
    chat       what is sent, and how a reply is taken
    pace       requests and tokens a minute
    expert     the endpoint as a `PolicyModel`
    studio     plays many episodes side by side into a log, resumable
    reflect    the policy's wrong episodes, up to where an expert takes over
    patterns, select, decontaminate, balance    which are kept; pure
    card, publish   what came of it
"""
