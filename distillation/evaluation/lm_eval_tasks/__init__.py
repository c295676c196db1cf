"""Offline tasks for EleutherAI's harness; ``lm_eval --include_path`` takes this folder as well."""
