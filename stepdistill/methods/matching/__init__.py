"""Distribution matching: DMD, DMD2, decoupled DMD, Phased DMD, DisBack, Flash-DMD."""
