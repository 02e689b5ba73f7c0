"""Consistency distillation: LCM, TCD, PCM, CM, TSCD (discrete); sCM, TBCM (continuous time)."""
