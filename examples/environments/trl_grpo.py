"""The calculator's problems for TRL's GRPOTrainer: the same tool, reward function and data.

pip install 'trl>=1'
python examples/environments/trl_grpo.py --model_name_or_path Qwen/Qwen2.5-3B-Instruct --output_dir runs/trl \
    --max_tool_calling_iterations 5 --max_completion_length 1024
"""

from pathlib import Path

from calculator import calculator, right
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer, ModelConfig, TrlParser

PROBLEMS = Path(__file__).with_name("problems.jsonl")
TRAINED = 100

if __name__ == "__main__":
    args, model = TrlParser((GRPOConfig, ModelConfig)).parse_args_and_config()
    trainer = GRPOTrainer(
        model=model.model_name_or_path,
        reward_funcs=right,
        args=args,
        train_dataset=Dataset.from_json(str(PROBLEMS)).select(range(TRAINED)),
        tools=[calculator],
    )
    trainer.train()
