"""Published results that the statistics must reproduce: `python -m tests.vectors FILE`.

`cases` reads a file and compares, `experiments` and `drift` say which public function answers which kind.
`statistics.json` holds 88 cases from R, statsmodels, scipy, GrowthBook, confseq, savvi, Evidently, NannyML,
Frouros, alibi-detect, river and DataSketches; a case names its source.
`variants.json` holds more of the same kinds with other options, computed with R 4.2.2 and gbstats 0.8.0.
"""
