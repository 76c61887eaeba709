"""`riffusion_t5`: `riffusion` that reads its instructions through FLAN-T5 instead of CLIP, see `flan_t5.py`.

python -m launch.convert --from=riffusion --input=FOLDER --output=MODEL
python -m launch.convert --from=flan-t5 --input=flan-t5-base --into=MODEL --output=MODEL_T5
python -m data_pipeline.build --config=configs/riffusion_t5.py --data_dir=DIR --encoders=MODEL_T5 --source=KIND:PATH
python -m launch.train --config=configs/riffusion_t5.py:base --data_dir=DIR --workdir=BASE --config.init_from=MODEL_T5
python -m launch.train --config=configs/riffusion_t5.py --data_dir=DIR --workdir=RUN --config.init_from=BASE
"""

import ml_collections

from configs import flan_t5, riffusion


def get_config(stage: str = "subtractive") -> ml_collections.ConfigDict:
    return flan_t5.apply(riffusion.get_config(stage))
