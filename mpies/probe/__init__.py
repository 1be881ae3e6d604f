"""Which sigma and alpha, before a run: a few pairs and prompts for a ladder of sigmas.

    mpirun -n N python -m mpies.probe [CONFIG.yaml] [section.key=value ...] [options]

The settings are those of mpies.train, whose noise, engine and rewards it uses; nothing is trained. The
unperturbed model answers some training prompts, then so do the members of antithetic pairs, the same
prompts and the same noise for every sigma. Then steps that these members would make are tried on other
prompts. What is lost, what differs, how much of it is signal, what a step gains: two tables, and a
recommendation with its reason. The result does not depend on the number of ranks.

options:
  --pairs P          antithetic pairs of members for each sigma (default 8)
  --prompts K        training prompts that each answers (default 32, or all there are); steps are tried
                     on as many others, the better ones on up to 7 times as many
  --sigmas A,B,...   the ladder (default: es.sigma times 1/8, 1/4, 1/2, 1, 2, 4, 8)
  --output FILE      a picture: .png, .svg or .pdf
  --json FILE        all figures, for scripts

exit codes: 0 done; 2 bad input, a line says which; anything else is a failure
"""
