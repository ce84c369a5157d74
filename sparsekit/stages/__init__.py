"""Stages with an optimization loop of their own: each gives what Trainer.fit takes."""
