"""LeaF: tokens that distract a student and not its teacher, left out in distillation (Guo et al., 2025)."""
