"""Pictures that the preset `photo` learns from: photographs, drawings and compositions of both, as encoded features."""
