-- Put in front of the scripts that make one state of two. Returns the JSON of a state with what another one has besides:
-- who is owed, and who is counted in a group of divergence.
local function union(one, other)
  local all, seen = {}, {}
  for _, list in ipairs({one or {}, other}) do
    for _, n in ipairs(type(list) == 'table' and list or {}) do
      if not seen[n] then
        seen[n] = true
        all[#all + 1] = n
      end
    end
  end
  return all
end

-- What cannot be read is a state that owes all.
local function record_of(state)
  local sound, found = pcall(cjson.decode, string.sub(state, (string.find(state, '\n', 1, true) or 0) + 1))
  return sound and type(found) == 'table' and found or {a = 0, t = 0, s = 0}
end

local function joined(state, other)
  local a, b = record_of(state), record_of(other)
  -- A state without "o" owes all of them.
  a.o = type(a.o) == 'table' and type(b.o) == 'table' and union(a.o, b.o) or nil
  for _, field in ipairs({'g', 'q'}) do
    if type(b[field]) == 'table' then
      if type(a[field]) ~= 'table' then a[field] = {} end
      for group, recipients in pairs(b[field]) do a[field][group] = union(a[field][group], recipients) end
    end
  end
  return cjson.encode(a)
end
