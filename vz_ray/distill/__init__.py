"""Distillation: SFT data from a teacher model behind an OpenAI-compatible endpoint.

In: tasks, or the policy's own wrong episodes. Out: a filtered SFT data set and a data card.
Episodes run through `env.run_episode`. Must not import engines or learners.

    cost_ledger       replies and their cost on disk, budget
    chat_messages     request messages, reply text
    rate_limiter      requests and tokens per minute
    teacher_client    HTTP client, retries, `Policy` adapter
    teacher_runner    concurrent, resumable episodes
    reflection        jobs from wrong episodes of the policy
    zoom_patterns, decontamination, filters    selection of episodes
    dataset           data set directory and data card
    run               bodies of `vz-ray distill exemplar` and `vz-ray distill reflect`
"""
