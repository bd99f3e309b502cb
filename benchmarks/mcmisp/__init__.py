"""Parts of the mcmisp benchmarks: the settings that they share, the training steps and the table builds that they measure."""
