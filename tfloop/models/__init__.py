"""Models: the article's CNN, and what the loop needs to know of any model."""

from tfloop.models.cnn import build as build
from tfloop.models.cnn import check_sizes as check_sizes
from tfloop.models.cnn import initial_weights as initial_weights
from tfloop.models.forward import activations as activations
from tfloop.models.forward import call_alone as call_alone
from tfloop.models.forward import outputs as outputs
from tfloop.models.inside import Activation as Activation
from tfloop.models.inside import added_losses as added_losses
from tfloop.models.inside import check_training as check_training
from tfloop.models.inside import is_leaf as is_leaf
from tfloop.models.layer_rules import over_parts_of as over_parts_of
from tfloop.models.names import keras_layers as keras_layers
from tfloop.models.normalization import counting as counting
from tfloop.models.output_kind import output_activation as output_activation
from tfloop.models.output_kind import output_activations as output_activations
from tfloop.models.output_kind import output_specs as output_specs
from tfloop.models.output_kind import probabilities as probabilities
from tfloop.models.output_kind import squashed_values as squashed_values
from tfloop.models.seeded import seeded as seeded
from tfloop.models.table import table as table
from tfloop.models.variables import Penalize as Penalize
from tfloop.models.variables import as_tf_variable as as_tf_variable
from tfloop.models.variables import named_variables as named_variables
from tfloop.models.variables import penalized as penalized
from tfloop.models.variables import stable_names as stable_names
from tfloop.models.variables import trained_state as trained_state
