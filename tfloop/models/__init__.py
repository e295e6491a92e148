"""Models: the article's CNN, and what the loop needs to know of any model."""

from tfloop.models.cnn import build as build
from tfloop.models.cnn import check_sizes as check_sizes
from tfloop.models.cnn import initial_weights as initial_weights
from tfloop.models.cnn import table as table
from tfloop.models.forward import activations as activations
from tfloop.models.forward import logits as logits
from tfloop.models.outputs import check_outputs as check_outputs
from tfloop.models.outputs import last_activation as last_activation
from tfloop.models.outputs import output_activation as output_activation
from tfloop.models.outputs import probabilities as probabilities
from tfloop.models.variables import named_variables as named_variables
from tfloop.models.variables import penalized_kernels as penalized_kernels
