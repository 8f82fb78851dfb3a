"""What a model is shown that takes more than plain text: pairs of texts, sound with transcripts."""

from upfit.examples.kinds import Kind as Kind
from upfit.examples.kinds import kind_of as kind_of
from upfit.examples.model_inputs import Example as Example
from upfit.examples.model_inputs import Examples as Examples
from upfit.examples.model_inputs import ModelInputs as ModelInputs
from upfit.examples.model_inputs import batches as batches
from upfit.examples.read import read_examples as read_examples
