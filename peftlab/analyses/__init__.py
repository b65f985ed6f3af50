"""One file per question: its docstring asks it, `OPTIONS` are its settings, `analyse` answers.

The first line of the docstring is the line of `peftlab analyze`; below it stand the equation with
shapes, and the source. `analyse(runs, **options)` takes `peftlab.recorded.Record`s and gives a
`peftlab.analysis.Analysis`. A question is known to the command and to the report by being there.
"""
