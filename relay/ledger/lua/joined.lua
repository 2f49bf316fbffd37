-- Put in front of the scripts that make one state of two: who is counted in a group of divergence in either of them.
local function joined(state, other)
  for _, field in ipairs({'g', 'q'}) do
    if type(other[field]) == 'table' then
      if type(state[field]) ~= 'table' then state[field] = {} end
      for group, recipients in pairs(other[field]) do
        local all, seen = {}, {}
        for _, list in ipairs({state[field][group] or {}, recipients}) do
          for _, n in ipairs(type(list) == 'table' and list or {}) do
            if not seen[n] then
              seen[n] = true
              all[#all + 1] = n
            end
          end
        end
        state[field][group] = all
      end
    end
  end
end
