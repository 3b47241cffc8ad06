"""The seam below the model: the same few operations, three times.

    plain    each as its formula, on whole arrays: the text to study, and what a port starts from
    fast     in blocks, on all cores: the everyday engine
    exact    each result is the float32 nearest to the exact one: the same bits on every machine

An engine is a module with these functions (`m` is the qwen3.Scope of the module that calls, `num` the numerics):

    linear(x, m, names, num, bias)          R(x Wᵀ + b) for each name, as the points of these names
    head(x, w, num)                         R(x wᵀ)
    attend(q, keys, values, window, m, num) softmax(q kᵀ / sqrt(Dh)) v, with the points scores and probs
    combine(x, chosen, p, expert, m, num)   the sum of each token's experts, weighted by p
    softmax, silu, mean_square, total       over the last axis, or elementwise
    power, cos, sin, log                    for the rotary tables
    rowwise(f, *arrays)                     f, which treats each row separately
    session(weights, config, new, last, num)    a context manager around one forward
"""
