"""The GPT that the example script trains, whole and as the stages of DeepSpeed's pipeline."""
