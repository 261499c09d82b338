"""Training Wan's transformer with NABLA: pre-training, fine-tuning, LoRA, and distillation from dense attention."""
