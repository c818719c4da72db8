# The paper's Table 4 cut down to a CPU: pretrain on 22 classes, fine-tune on others with 50 images a class.
#   bash run.sh teacher|student|lone|tuned S      (S: a seed), where resnet64.py and data/{pretrain,finegrained,scenes} lie
# `teacher` and `student` pretrain; then `lone S`; `tuned S` needs `teacher` and `student`.
AT="${AT:-attention-transfer}"
PRE="--data folder:data/pretrain --image-size 64 --crop-padding 8 --batch-size 64 --lr 0.1 --epochs 8"
tune() { $AT "$@" --recipe finetune --data folder:data/$set --image-size 64 --augment crop --crop-padding 8 \
  --limit-train $((50 * $(ls data/$set/train | wc -l))) --batch-size 32 --epochs 20 --milestones 11,17; }
case $1 in
teacher)
  $AT train --model resnet64.py:resnet34 $PRE --out pretrained/teacher
  for set in finegrained scenes; do tune train --model resnet64.py:resnet34 --student-weights pretrained/teacher --out runs/$set/teacher; done ;;
student) $AT train --model resnet64.py:resnet18 $PRE --out pretrained/student ;;
lone) for set in finegrained scenes; do
  tune distill --student resnet64.py:resnet18 --student-weights pretrained/student --method none --pairs auto --seed $2 --out runs/$set/none/seed-$2; done ;;
tuned) for set in finegrained scenes; do for method in kd at; do
  beta=""; pairs="--pairs auto"; [ $method = at ] && beta="--beta 100" && pairs="--pairs last2"
  tune distill --student resnet64.py:resnet18 --student-weights pretrained/student --teacher runs/$set/teacher --method $method $beta $pairs --seed $2 --out runs/$set/$method/seed-$2; done; done ;;
esac
