# Two pairs of timm networks of different families, trained from scratch on 22 classes of Tiny ImageNet.
#   bash pairs.sh        (where data/pretrain lies)
AT="${AT:-attention-transfer}"
COMMON="--data folder:data/pretrain --image-size 64 --crop-padding 8 --batch-size 64"
$AT train --model timm/resnet18 $COMMON --lr 0.1 --epochs 16 --out runs/pairs/teacher
for seed in 0 1; do for method in none at; do
  beta=""; [ $method = at ] && beta="--beta 100"
  $AT distill --teacher runs/pairs/teacher --student timm/mobilenetv3_small_075 --method $method $COMMON --lr 0.1 --epochs 6 $beta --seed $seed --out runs/pairs/mobilenetv3/$method/seed-$seed
  $AT distill --teacher runs/pairs/teacher --student timm/pvt_v2_b0 --method $method $COMMON --optimizer adamw --lr 0.001 --weight-decay 0.05 --epochs 6 $beta --seed $seed --out runs/pairs/pvt_v2/$method/seed-$seed
done; done
