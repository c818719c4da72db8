# The paper's Table 4 cut down to a CPU: pretrain on 22 classes, fine-tune on others with 50 images a class.
#   bash run.sh student | teacher | strong | lone S | tuned S [strong]     (S: a seed), where resnet64.py and data/ lie
# data/ holds pretrain, finegrained and scenes. `student`, `teacher` and `strong` pretrain, the last two are also tuned;
# `lone S` needs `student`; `tuned S` needs `teacher` too, or, with that word, `strong`.
AT="${AT:-attention-transfer}"
PRE="--data folder:data/pretrain --image-size 64 --crop-padding 8 --batch-size 64 --lr 0.1"
tune() { $AT "$@" --recipe finetune --data folder:data/$set --image-size 64 --augment crop --crop-padding 8 \
  --limit-train $((50 * $(ls data/$set/train | wc -l))) --batch-size 32 --epochs 20 --milestones 11,17; }
case $1 in
student) $AT train --model resnet64.py:resnet18 $PRE --epochs 24 --out pretrained/student ;;
teacher | strong)
  [ $1 = teacher ] && how="--epochs 24" || how="--epochs 40 --mixup 0.2 --cutmix 1"
  $AT train --model resnet64.py:resnet34 $PRE $how --out pretrained/$1
  for set in finegrained scenes; do
    tune train --model resnet64.py:resnet34 --student-weights pretrained/$1 --out $1/$set/teacher; done ;;
lone) for set in finegrained scenes; do
  tune distill --student resnet64.py:resnet18 --student-weights pretrained/student --method none --pairs auto --seed $2 --out lone/$set/seed-$2; done ;;
tuned) from=${3:-teacher}; for set in finegrained scenes; do for method in kd at; do
  beta=""; pairs="--pairs auto"; [ $method = at ] && beta="--beta 100" && pairs="--pairs last2"
  tune distill --student resnet64.py:resnet18 --student-weights pretrained/student --teacher $from/$set/teacher --method $method $beta $pairs --seed $2 --out $from/$set/$method/seed-$2; done; done ;;
*) echo "unknown step '$1'" >&2; exit 2 ;;
esac
