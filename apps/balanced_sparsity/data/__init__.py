"""The workloads' data: images, text, speech; embedded defaults, and real sets from folders or archives of the configuration."""
