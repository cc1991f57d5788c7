"""The main job: a small GPT trained on packed real documents under context parallelism, equal to one rank."""
