"""Compact vision transformers in plain PyTorch, with the names of the two code bases' tensors.

Written from their descriptions: what layer stands where, and what it is called.
"""

import math

import torch
from torch import nn
from torch.nn import functional


class HeadsApart(nn.Module):
  """Attention with a query, key and value projection for every head."""

  def __init__(self, width, heads, bias):
    super().__init__()
    self.heads = nn.ModuleList()
    for _ in range(heads):
      head = {n: nn.Linear(width, width // heads, bias=bias) for n in ('query', 'key', 'value')}
      self.heads.append(nn.ModuleDict(head))
    self.output_projection = nn.Linear(width, width)

  def forward(self, x):
    mixed = []
    for head in self.heads:
      q, k, v = (head[n](x) for n in ('query', 'key', 'value'))
      weights = (q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])).softmax(dim=-1)
      mixed.append(weights @ v)
    return self.output_projection(torch.cat(mixed, dim=-1))


class HeadsMerged(nn.Module):
  """Attention with one projection; `names` are of that and of the output's."""

  def __init__(self, width, heads, bias, names):
    super().__init__()
    self.count, self.names = heads, names
    self.add_module(names[0], nn.Linear(width, 3 * width, bias=bias))
    self.add_module(names[1], nn.Linear(width, width))

  def forward(self, x):
    project, output = (getattr(self, name) for name in self.names)
    q, k, v = (t.unflatten(2, (self.count, -1)).transpose(1, 2) for t in project(x).chunk(3, dim=2))
    return output(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def pool_sequence(score, x):
  return (score(x).softmax(dim=1) * x).sum(dim=1)


class FromScratch(nn.Module):
  """vit-from-scratch: a class token, or with `seq` the sequence pooling."""

  def __init__(self, seq, apart, width=48, depth=2, heads=4, hidden=96, tokens=16, classes=5):
    super().__init__()
    self.embedding = nn.Module()
    self.embedding.patch_embeddings = nn.Module()
    self.embedding.patch_embeddings.projection = nn.Conv2d(3, width, 4, 4)
    self.embedding.position_embeddings = nn.Parameter(torch.zeros(1, tokens + (not seq), width))
    if seq:
      self.pooling = nn.Module()
      self.pooling.attention_pool = nn.Linear(width, 1)
    else:
      self.embedding.cls_token = nn.Parameter(torch.zeros(1, 1, width))
    self.encoder = nn.Module()
    self.encoder.blocks = nn.ModuleList()
    for _ in range(depth):
      block = nn.Module()
      names = ('qkv_projection', 'output_projection')
      block.attention = (
        HeadsApart(width, heads, True) if apart else HeadsMerged(width, heads, True, names)
      )
      block.layernorm_1, block.layernorm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
      block.mlp = nn.Module()
      block.mlp.dense_1, block.mlp.dense_2 = nn.Linear(width, hidden), nn.Linear(hidden, width)
      self.encoder.blocks.append(block)
    self.classifier = nn.Linear(width, classes)

  def forward(self, x):
    e = self.embedding
    x = e.patch_embeddings.projection(x).flatten(2).transpose(1, 2)
    if hasattr(e, 'cls_token'):
      x = torch.cat([e.cls_token.expand(len(x), -1, -1), x], dim=1)
    x = x + e.position_embeddings
    for block in self.encoder.blocks:
      x = x + block.attention(block.layernorm_1(x))
      hidden = functional.gelu(block.mlp.dense_1(block.layernorm_2(x)), approximate='tanh')
      x = x + block.mlp.dense_2(hidden)
    if hasattr(e, 'cls_token'):
      return self.classifier(x[:, 0])
    return self.classifier(pool_sequence(self.pooling.attention_pool, x))


class CompactTransformer(nn.Module):
  """SHI-Labs': `convs` convolutions or, where there are none, patches; pool 'seq' or 'cls'."""

  def __init__(self, convs, pool, position, width=128, depth=2, hidden=64, tokens=16, classes=5):
    super().__init__()
    channels = [3, *[64] * (convs - 1), width]
    layers = [
      nn.Sequential(
        nn.Conv2d(channels[i], channels[i + 1], 3, 1, 1, bias=False),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, 1),
      )
      for i in range(convs)
    ] or [nn.Sequential(nn.Conv2d(3, width, 4, 4))]
    self.tokenizer = nn.Module()
    self.tokenizer.conv_layers = nn.Sequential(*layers)
    c = self.classifier = nn.Module()
    if position != 'none':
      count = tokens + (pool == 'cls')
      c.positional_emb = nn.Parameter(torch.zeros(1, count, width), position == 'learnable')
    if pool == 'cls':
      c.class_emb = nn.Parameter(torch.zeros(1, 1, width))
    else:
      c.attention_pool = nn.Linear(width, 1)
    c.blocks = nn.ModuleList()
    for _ in range(depth):
      block = nn.Module()
      block.pre_norm, block.norm1 = nn.LayerNorm(width), nn.LayerNorm(width)
      block.self_attn = HeadsMerged(width, width // 64, False, ('qkv', 'proj'))
      block.linear1, block.linear2 = nn.Linear(width, hidden), nn.Linear(hidden, width)
      c.blocks.append(block)
    c.norm, c.fc = nn.LayerNorm(width), nn.Linear(width, classes)

  def forward(self, x):
    c = self.classifier
    x = self.tokenizer.conv_layers(x).flatten(2).transpose(1, 2)
    if hasattr(c, 'class_emb'):
      x = torch.cat([c.class_emb.expand(len(x), -1, -1), x], dim=1)
    x = x + getattr(c, 'positional_emb', 0)
    for block in c.blocks:
      x = block.norm1(x + block.self_attn(block.pre_norm(x)))
      x = x + block.linear2(functional.gelu(block.linear1(x)))
    x = c.norm(x)
    return c.fc(x[:, 0] if hasattr(c, 'class_emb') else pool_sequence(c.attention_pool, x))
