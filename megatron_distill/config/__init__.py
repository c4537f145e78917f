from megatron_distill.config.sections import MetricsSection as MetricsSection
